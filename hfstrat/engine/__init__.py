"""What `compare` and `tune` share: recipes side by side and their processes. No torch in here."""
