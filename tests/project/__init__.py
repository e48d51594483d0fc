"""Tests of the project as a whole: pages, packaging, examples, the suite's own runner."""
