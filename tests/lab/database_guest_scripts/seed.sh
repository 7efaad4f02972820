#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# In the chroot of the image that is being made: a small database below /srv/seed, which a guest
# copies to its volume when it boots. $1: rows of each table. $2: statements that make the agent's SQL user.
set -euo pipefail
data=/srv/seed/mysql
socket=/tmp/seed.sock
source /server.sh

id mysql >/dev/null 2>&1 || useradd --system --home-dir /nonexistent mysql
mkdir -p "$data"
chown mysql:mysql "$data"
install_server "$data"
$server --no-defaults --user=mysql --datadir="$data" --socket="$socket" --pid-file=/tmp/seed.pid \
    --skip-networking --innodb-buffer-pool-size=256M --innodb-flush-log-at-trx-commit=0 \
    --event-scheduler=OFF "${server_options[@]}" "${seed_options[@]}" >/tmp/seed.log 2>&1 &
pid=$!
# Whatever fails, no process is left in the chroot
trap 'kill "$pid" 2>/dev/null || true; wait' EXIT
for _ in $(seq 300); do
    if admin ping >/dev/null 2>&1; then break; fi
    sleep 0.2
done
digits="(SELECT 0 AS d UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4
    UNION ALL SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)"
client <<SQL
$2
CREATE DATABASE lab;
USE lab;
CREATE TABLE t1 (id INT PRIMARY KEY, k INT NOT NULL, c CHAR(120) NOT NULL, KEY (k)) CHARSET latin1;
INSERT INTO t1 SELECT seq, seq * 7919 % 100003, CONCAT(SHA2(seq, 256), LEFT(SHA2(-seq, 256), 40)) FROM
    (SELECT 1 + a.d + 10 * b.d + 100 * c.d + 1000 * d.d + 10000 * e.d + 100000 * f.d AS seq
     FROM $digits a, $digits b, $digits c, $digits d, $digits e, $digits f) AS numbers
    WHERE seq <= $1 ORDER BY seq;
CREATE TABLE t2 LIKE t1;
INSERT INTO t2 SELECT * FROM t1;
-- What the guest's server does by itself while event_scheduler is on
CREATE TABLE pace (changes INT NOT NULL, done INT NOT NULL);
INSERT INTO pace VALUES (10, 0);
DELIMITER //
CREATE EVENT work ON SCHEDULE EVERY 1 SECOND DO BEGIN
    DECLARE n INT DEFAULT (SELECT changes FROM pace);
    DECLARE chosen INT;
    WHILE n > 0 DO
        SET chosen = 1 + FLOOR(RAND() * $1);
        UPDATE t1 SET k = k + 1, c = SHA2(RAND(), 256) WHERE id = chosen;
        SET n = n - 1;
    END WHILE;
    UPDATE pace SET done = done + 1;
END //
SQL
admin shutdown
wait "$pid"
rm -f /tmp/seed.log
