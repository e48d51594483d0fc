"""The suite; its folders mirror those of the sources."""
