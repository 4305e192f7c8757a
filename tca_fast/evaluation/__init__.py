"""How close a model is to the target, how well it reasons, and the page that shows both."""
