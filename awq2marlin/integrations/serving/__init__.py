"""What plugins of serving engines share: which layer is loaded how, what was loaded, and what is done to it then."""
