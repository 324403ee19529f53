"""What a user might pick instead, doing the same work; each file runs alone in a virtualenv that has that peer."""
