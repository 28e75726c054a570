"""A three-member etcd with TLS and least-privilege users: files, users, and members on this machine."""
