"""Every method of the command line: what it is called, its options, model and optimizer."""
