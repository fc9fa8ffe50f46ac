"""Only the head learns: features of a frozen body, the layer that says most, a head that is solved."""
