# An image of a worker. Build it, or start yours from it and add the code of your jobs:
#
#   docker build -t dagster-taskiq .
#
#   FROM dagster-taskiq
#   COPY --chown=dagster my_jobs /opt/dagster/my_jobs
#   COPY --chown=dagster dagster.yaml /opt/dagster/home/dagster.yaml

FROM python:3.11-slim AS build
WORKDIR /build
RUN python -m venv /opt/venv
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src
COPY infra ./infra
RUN /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[postgres]'

FROM python:3.11-slim
RUN useradd --system --create-home --home-dir /opt/dagster --uid 10001 dagster
COPY --from=build /opt/venv /opt/venv
COPY --chown=dagster worker_entrypoint.py /opt/dagster/worker_entrypoint.py
ENV PATH=/opt/venv/bin:$PATH \
    DAGSTER_HOME=/opt/dagster/home \
    PYTHONUNBUFFERED=1
RUN mkdir -p /opt/dagster/home && chown dagster /opt/dagster/home
USER dagster
WORKDIR /opt/dagster
# In exec form, so that SIGTERM arrives. The worker asks nobody but itself whether it is alive.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["dagster-taskiq", "worker", "health"]
ENTRYPOINT ["python", "/opt/dagster/worker_entrypoint.py"]
