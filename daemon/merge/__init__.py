"""`foldd merge`: the file side of offline merging; the mathematics is in fusion.offline."""
