"""Pages: one HTML file without scripts or external resources. Blocks, charts and the style; what they show is decided above."""
