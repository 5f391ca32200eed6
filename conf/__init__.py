"""Complete YAML, composed by Hydra."""
