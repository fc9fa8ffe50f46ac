"""What is measured of a model: by `hfstrat evaluate`, and by a training run before and after. One code for both."""
