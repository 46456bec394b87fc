"""What single layers can learn, measured on closed-form fits."""
