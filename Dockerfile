# attune on CPU, all programs in one image. The base is an argument so that it can come from any
# registry: docker build --build-arg BASE=debian:bookworm-slim -t attune .
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
COPY deploy/install_packages.sh /src/deploy/
RUN /src/deploy/install_packages.sh build
COPY . /src
RUN cmake -S /src -B /build -G Ninja -DCMAKE_BUILD_TYPE=Release -DATTUNE_CUDA=OFF \
 && cmake --build /build --target attuned attune-worker attune-trainer attune \
 && strip /build/bin/attuned /build/bin/attune-worker /build/bin/attune-trainer /build/bin/attune

FROM ${BASE}
COPY deploy/install_packages.sh /tmp/
RUN /tmp/install_packages.sh run && rm -rf /var/lib/apt/lists/* /tmp/install_packages.sh \
 && useradd --system --uid 10001 --home-dir /var/lib/attune attune \
 && mkdir -p /var/lib/attune /var/lib/attune-worker /models \
 && chown attune /var/lib/attune /var/lib/attune-worker
COPY --from=build /build/bin/attuned /build/bin/attune-worker /build/bin/attune-trainer /build/bin/attune /usr/local/bin/
USER attune
ENV XDG_DATA_HOME=/var/lib
VOLUME /var/lib/attune
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["attune", "workers", "--output", "json"]
ENTRYPOINT ["attuned"]
CMD ["--data-dir", "/var/lib/attune", "--listen", "127.0.0.1:7410"]
