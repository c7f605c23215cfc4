"""What `validate` checks, rule by rule; each module yields (rule, message)."""
