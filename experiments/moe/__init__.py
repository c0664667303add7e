"""Mixture-of-experts models trained under parallel foldings."""
