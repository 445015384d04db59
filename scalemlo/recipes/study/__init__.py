"""What every recipe is run by: configuration, comparison of arms, restart, plan and picture."""
