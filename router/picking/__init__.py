"""How an endpoint is chosen: filters, scorers, one picker; plug-ins of the group `millrace.picking`."""
