"""The embedded simulator: MetaDrive physics, scenarios, our own cameras, and the expert driver. Knows no network."""
