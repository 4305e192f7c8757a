"""Adapters to and from the Hugging Face hub."""
