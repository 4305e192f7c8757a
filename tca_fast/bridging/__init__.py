"""Two models that share everything but their MLPs, and the objective that makes them agree."""
