"""Files of models and adapters, read and written so that nothing of a user's is lost."""
