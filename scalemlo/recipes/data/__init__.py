"""Data sets that recipes share."""
