"""On the device: artifact store, session, slot, subscriber, small server. Never torch."""
