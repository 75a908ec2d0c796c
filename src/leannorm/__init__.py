"""leannorm."""
