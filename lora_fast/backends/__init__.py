"""The torch backend, the Triton backend, and the choice between them."""
