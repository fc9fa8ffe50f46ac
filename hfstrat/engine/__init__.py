"""What `compare` and `tune` share: recipes side by side, their processes, charts and the style of a page. No torch in here."""
