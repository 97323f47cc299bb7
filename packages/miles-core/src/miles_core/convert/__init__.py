"""Bring models from other formats and places into a Hugging Face style folder."""
