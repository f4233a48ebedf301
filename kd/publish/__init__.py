"""A finished run for others: its model card, and its export on the Hugging Face hub."""
