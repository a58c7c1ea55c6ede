# The gateway for production: needs DATABASE_URL, runs as an unprivileged user, holds no state. See docs/docker.md.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# Every package is verified against its hash here; later steps take wheels from this folder only.
COPY requirements.lock .
RUN pip wheel --require-hashes --no-deps --wheel-dir /wheels -r requirements.lock \
    && pip install --no-index --find-links /wheels hatchling

COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY migrations migrations
RUN pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels .

# Named without an extra, so the lock's test tools and the embedded PostgreSQL stay behind.
RUN python -m venv --without-pip /opt/parley \
    && pip --python /opt/parley/bin/python install --no-index --find-links /wheels parley


FROM python:3.13-slim
COPY --from=build /opt/parley /opt/parley
ENV PATH=/opt/parley/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PARLEY_HOST=0.0.0.0 \
    PARLEY_PORT=8080
# A number, because Kubernetes' runAsNonRoot cannot look up names.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PARLEY_PORT']), timeout=4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["parley"]
CMD ["serve"]
