"""What tests of this package and of users need: small random models."""
