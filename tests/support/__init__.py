"""What tests share, and tests of it."""
