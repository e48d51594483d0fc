"""PTX text as instructions."""
