"""One server put together by hand: what is built, what requests find, what runs beside them, how it comes and goes."""
