"""Files of models and adapters, read and written so that no user data is lost."""
