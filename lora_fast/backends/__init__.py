"""Where an operation is computed: the torch backend, the Triton backend, and which of them."""
