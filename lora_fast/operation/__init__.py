"""The operation: checked arguments in, an autograd.Function or a registered operator, a backend."""
