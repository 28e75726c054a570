"""The part of Millrace that decides: API, gateway, sizing, scheduler, reconciler, fleet."""
