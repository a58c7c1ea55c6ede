"""Tests of the providers: real sockets, real wire bytes."""
