"""The ops where other projects look for them."""
