"""Responses that a model writes while the student is trained, and what is learned from them."""
