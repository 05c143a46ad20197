"""How noise and data are mixed (training) and how noise becomes data (sampling)."""
