"""Models that recipes share."""
