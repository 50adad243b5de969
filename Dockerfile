# The broker alone on a small Debian:
#   docker build -t leveret .
#   docker run -p 5672:5672 -v leveret:/var/lib/leveret leveret

FROM rust:1-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends clang g++ libclang-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin leveret && strip target/release/leveret

FROM debian:bookworm-slim
# RocksDB needs libstdc++, which this image may or may not have.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --no-create-home --home-dir /var/lib/leveret \
        --shell /usr/sbin/nologin leveret \
    && install -d -o leveret -g leveret -m 0750 /var/lib/leveret
COPY --from=build /src/target/release/leveret /usr/local/bin/leveret
COPY LICENSE /usr/share/doc/leveret/LICENSE

# Inside a container every client is remote, so guest is let in from anywhere, as in RabbitMQ's image. Give
# LEVERET_DEFAULT_USER and LEVERET_DEFAULT_PASSWORD, or a file with users, wherever strangers can reach the port.
ENV LEVERET_DATA_DIR=/var/lib/leveret \
    LEVERET_LOOPBACK_USERS=none
USER leveret
WORKDIR /var/lib/leveret
VOLUME /var/lib/leveret
EXPOSE 5672
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s CMD ["leveret", "ping"]
ENTRYPOINT ["leveret"]
