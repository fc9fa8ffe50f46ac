"""What a frozen part of a model computes, computed once: hidden states as a column of the data."""
