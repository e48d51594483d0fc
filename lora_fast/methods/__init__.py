"""The methods of the command line: name, options, model and optimizer."""
