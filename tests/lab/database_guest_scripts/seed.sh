#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# In the chroot of the image that is being made: a small database below /srv/seed, which a guest
# copies to its volume when it boots. $1: rows of each table. $2: statements that make the agent's SQL user.
set -euo pipefail
data=/srv/seed/mysql
socket=/tmp/seed.sock

mkdir -p "$data"
chown mysql:mysql "$data"
mariadb-install-db --no-defaults --user=mysql --datadir="$data" --force --skip-test-db >/dev/null
/usr/sbin/mariadbd --no-defaults --user=mysql --datadir="$data" --socket="$socket" \
    --skip-networking --skip-log-bin --innodb-buffer-pool-size=256M --innodb-log-file-size=32M \
    --innodb-flush-log-at-trx-commit=0 >/tmp/seed.log 2>&1 &
for _ in $(seq 300); do
    if mariadb-admin --no-defaults --socket="$socket" ping >/dev/null 2>&1; then break; fi
    sleep 0.2
done
mariadb --no-defaults --socket="$socket" <<SQL
$2
CREATE DATABASE lab;
USE lab;
CREATE TABLE t1 (id INT PRIMARY KEY, k INT NOT NULL, c CHAR(120) NOT NULL, KEY (k)) CHARSET latin1;
INSERT INTO t1 SELECT seq, seq * 7919 % 100003, CONCAT(MD5(seq), MD5(-seq), SHA1(seq))
    FROM seq_1_to_$1;
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
        UPDATE t1 SET k = k + 1, c = CONCAT(MD5(RAND()), MD5(n)) WHERE id = chosen;
        SET n = n - 1;
    END WHILE;
    UPDATE pace SET done = done + 1;
END //
SQL
mariadb-admin --no-defaults --socket="$socket" shutdown
wait
rm -f /tmp/seed.log
