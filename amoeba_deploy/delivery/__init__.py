"""Delivery: from a bundle on a builder to a signed, archived or registered one that a device can trust."""
