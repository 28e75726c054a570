"""What users and operators call: the gRPC servicer of SchedulerService.

Every call is checked (`validation`), authorised (`policy`, enforced by `core.rpc`) and delegated. The
API writes `spec/` and reads everything else from mirrors; it decides nothing about placement.
"""
