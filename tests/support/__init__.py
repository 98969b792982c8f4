"""What tests of several tiers share: a site to work on, and waiting with a deadline."""
