"""The commands; the only place that parses flags."""
