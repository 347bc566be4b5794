"""Rows in two tiers, device and host, and what moves them between the two ahead of time."""
