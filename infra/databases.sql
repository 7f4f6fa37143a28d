-- Creates the databases and their owners; PostgreSQL's image runs this file when its volume is empty. psql 15 and newer
-- read environment variables, so that no command line shows the passwords.
\set ON_ERROR_STOP on
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv prefect_password PREFECT_DB_PASSWORD

CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';

CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE prefect OWNER prefect;

-- By default every role may connect to every database.
REVOKE CONNECT, TEMPORARY ON DATABASE mlflow, mlflow_auth, prefect FROM PUBLIC;
